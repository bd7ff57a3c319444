"""
What happens beside a run, in its own process or the reporter's: hooks, pings and mail, one step after the other.

No step can change how the run went, nor keep the next one from its turn: each has its limit, and what goes wrong in it
is logged and returned, to be recorded as the reason in the run's history.
"""

from __future__ import annotations

import base64
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote, urlsplit, urlunsplit

from django.core.mail import EmailMessage
from django.db import connections
from django.utils.module_loading import import_string

from ..entries import Claim, Hook, Mail, Moment, Outcome, OutputFile, Ping, RunInfo, ScheduledTask, Status, dotted_path
from .base import Deliver, Event, Tasks, is_accompanied
from .current import CurrentRun, set_current_run
from .perform import TookTooLong, clean, limited, open_blocks, roll_back, waited_for

HOOK_LIMIT = 60.0
PING_LIMIT = 10.0
MAIL_LIMIT = 60.0
REPORT_LIMIT: Final = 8.0
"""Of a step in the reporter, which is killed when it takes longer than 10 s over anything."""
_AROUND: Final = 2.0  # what a step may take beside its limit: undoing a transaction, writing the log
USER_AGENT: Final = "multiserver-schedule"

log: Final = logging.getLogger("multiserver_schedule")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run went, as hooks and mail are told of it."""

    status: Status
    error: str = ""
    output: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One hook, ping or mail at one end of a run."""

    item: Hook | Ping | Mail

    @property
    def name(self) -> str:
        """What it is, for the log and the history: of an address, neither its query nor who asks."""
        item = self.item
        if isinstance(item, Hook):
            word = f"on_{item.moment}" if item.moment in ("success", "failure") else item.moment
            return f"{word} hook {item.function if isinstance(item.function, str) else dotted_path(item.function)}"
        if isinstance(item, Ping):
            word = {"before": "ping_before", "after": "then_ping"}.get(item.moment, f"ping_on_{item.moment}")
            return f"{word} {without_secrets(item.url)}"
        return f"mail to {', '.join(item.to)}"

    @property
    def limit(self) -> float:
        """How many seconds it may take."""
        item = self.item
        return HOOK_LIMIT if isinstance(item, Hook) else PING_LIMIT if isinstance(item, Ping) else MAIL_LIMIT

    def take(self, task: ScheduledTask, run: RunInfo, ending: Ending | None, limit: float) -> None:
        """Do it; raises whatever goes wrong."""
        if isinstance(self.item, Hook):
            _call_hook(self.item, run, ending, limit)
        elif isinstance(self.item, Ping):
            ping(self.item.url, limit)
        elif ending is not None:
            send_mail(self.item, task, run, ending)


def steps_before(task: ScheduledTask) -> list[Step]:
    """Return what comes before a run: pings, then hooks."""
    pings = [Step(ping) for ping in task.pings if ping.moment == "before"]
    return pings + [Step(hook) for hook in task.hooks if hook.moment == "before"]


def steps_after(task: ScheduledTask, status: Status, *, final: bool) -> list[Step]:
    """
    Return what comes after a run that ended so: the hooks of its end, those of every end, pings, mail.

    ``final``: no further attempt follows. Of a failure that is followed by one, nobody is told yet; and one that made
    way for a newer due time has not failed.
    """
    how: Moment | None = "success" if status == "succeeded" else "failure" if final else None
    if status == "cancelled":
        how = None
    hooks = [Step(hook) for moment in (how, "after") for hook in task.hooks if hook.moment == moment]
    pings = [Step(ping) for ping in task.pings if ping.moment in (how, "after")]
    mails = [Step(mail) for mail in task.mails if how == "failure" or (how == "success" and not mail.only_on_failure)]
    return hooks + pings + mails


def longest(steps: Sequence[Step]) -> float:
    """Return how many seconds these may take in all."""
    return sum(step.limit + _AROUND for step in steps)


def wants_output(task: ScheduledTask) -> bool:
    """Has the run's process to be told what was printed, for hooks or mail?"""
    return bool(task.mails) or any(hook.moment != "before" for hook in task.hooks)


@dataclass(slots=True)
class Beside:
    """Takes the steps of one run, and remembers what went wrong."""

    task: ScheduledTask
    run: RunInfo
    tell: Callable[[Mapping[str, Any]], object] = lambda message: None
    """Told, in the words of the pipe, what is being done and what went wrong."""
    most: float = float("inf")
    """Of any one step, in seconds."""
    trouble: list[str] = field(default_factory=list)
    interrupted: KeyboardInterrupt | None = None

    def take(self, steps: Sequence[Step], ending: Ending | None = None) -> None:
        """Take these steps, one after the other, whatever becomes of each."""
        for step in steps:
            self.tell({"t": "beside", "doing": step.name})
            try:
                self._take(step, ending)
            except BaseException as error:  # a limit that came a moment too late
                self.note(step.name, _said(error))
        if steps:
            self.tell({"t": "beside", "doing": ""})

    def _take(self, step: Step, ending: Ending | None) -> None:
        limit = min(step.limit, self.most)
        before = open_blocks()
        problem: BaseException | None = None
        left: list[str] = []
        try:
            with limited(limit):
                step.take(self.task, self.run, ending, limit)
        except BaseException as error:  # sys.exit, too
            problem = error
            if isinstance(error, KeyboardInterrupt):
                self.interrupted = error
        with limited(_AROUND):
            if isinstance(problem, TookTooLong):
                _close_broken(before)
            left = roll_back(before)
        if problem is not None:
            self.note(step.name, _said(problem), problem if isinstance(step.item, Hook) else None)
        elif left:
            self.note(step.name, f"left a transaction open on {', '.join(map(repr, left))}; it was rolled back")

    def open_output(self, file: OutputFile, opener: Callable[[], object]) -> None:
        """Open the file that the run prints to; where that cannot be, the run prints into its record alone."""
        try:
            with limited(PING_LIMIT):
                opener()
        except Exception as error:
            self.note(f"output file {file.path}", _said(error))

    def note(self, name: str, text: str, exception: BaseException | None = None) -> None:
        """Remember, tell and log that something went wrong."""
        trouble = clean(" ".join(f"{name}: {text}".split()))[:255]
        self.trouble.append(trouble)
        self.tell({"t": "beside", "trouble": [trouble]})
        with suppress(BaseException), limited(_AROUND):
            log.log(
                logging.WARNING if exception is None else logging.ERROR,
                "%s task=%s due=%s server=%s",
                trouble,
                self.run.name,
                self.run.due_at.isoformat(),
                self.run.server,
                exc_info=exception,
            )


def _said(error: BaseException) -> str:
    if isinstance(error, (TookTooLong, PingFailed)):
        return str(error)
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # a __str__ that raises
        return type(error).__name__


def _close_broken(before: Mapping[str, int]) -> None:
    """Close what was broken off in the middle of a statement, maybe; not what a caller has a block open on."""
    for connection in connections.all(initialized_only=True):
        if not before.get(connection.alias):
            with suppress(Exception):
                connection.close()


# --- hooks


def _call_hook(hook: Hook, run: RunInfo, ending: Ending | None, limit: float) -> None:
    function = import_string(hook.function) if isinstance(hook.function, str) else hook.function
    known: dict[str, Any] = {"run": run}
    if ending is not None:
        known |= {name: getattr(ending, name) for name in ("status", "output", "error", "seconds")}
    waited_for(function(**named_of(function, {name: known[name] for name in hook.offered})), limit)


def named_of(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments that a function names: all for ``**kwargs``, none where nobody can tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(offered)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in offered.items() if name in names}


# --- pings


class PingFailed(Exception):
    """An address could not be reached, or did not say yes. The message holds nothing of the address."""


def without_secrets(url: str) -> str:
    """Return an address without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def ping(url: str, limit: float) -> None:
    """
    GET an address, and follow where it leads, by HTTP alone. Raises PingFailed unless the answer is 2xx.

    What the libraries say of a fault may quote the address, so little of it is passed on.
    """
    # Not at the top: each pass would load it, and few have anything to ping.
    from urllib import request as http
    from urllib.error import HTTPError, URLError

    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    bare = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
    # The schemes are those of the opener: not build_opener(), which knows files and FTP too, where an answer could
    # send us.
    opener = http.OpenerDirector()
    for handler in (
        http.ProxyHandler,
        http.HTTPHandler,
        http.HTTPSHandler,
        http.HTTPRedirectHandler,
        http.HTTPDefaultErrorHandler,
        http.HTTPErrorProcessor,
        http.UnknownHandler,
    ):
        opener.add_handler(handler())
    asked = http.Request(bare, headers={"User-Agent": USER_AGENT})  # noqa: S310
    if at:
        login = base64.b64encode(unquote(user).encode()).decode()
        asked.add_unredirected_header("Authorization", f"Basic {login}")
    try:
        with opener.open(asked, timeout=limit):
            return
    except HTTPError as error:
        error.close()
        raise PingFailed(f"was answered with {error.code}") from None
    except TimeoutError:
        raise PingFailed(f"took longer than {limit:g} s") from None
    except URLError as error:
        reason = error.reason
        if isinstance(reason, TimeoutError):
            raise PingFailed(f"took longer than {limit:g} s") from None
        why = f"{type(reason).__name__}: {reason}" if isinstance(reason, OSError) else "could not be reached"
        raise PingFailed(why) from None
    except TookTooLong:
        raise
    except Exception as error:
        raise PingFailed(type(error).__name__) from None


# --- mail


def send_mail(mail: Mail, task: ScheduledTask, run: RunInfo, ending: Ending) -> None:
    """Mail the output; nothing of a run that succeeded and printed nothing."""
    if ending.status == "succeeded" and not ending.output.strip():
        return
    how = ending.status.replace("_", " ")
    lines = [
        f"{run.name} {how} on {run.server}, after {ending.seconds:.1f} s.",
        "",
        f"Due: {run.due_at:%Y-%m-%d %H:%M:%S} UTC" + (f", attempt {run.attempt}" if run.attempt > 1 else ""),
        f"Runs: {task.text}",
    ]
    if ending.error:
        lines += ["", "Error:", "", ending.error.rstrip()]
    lines += ["", "Output:", "", ending.output.rstrip()] if ending.output.strip() else ["", "It printed nothing."]
    message = EmailMessage(subject=f"{run.name} {how} on {run.server}", body="\n".join(lines) + "\n", to=list(mail.to))
    message.send()


# --- runs that could not tell of their end


def events(claim: Claim, outcome: Outcome, *, final: bool, late: bool = False) -> Iterator[Event]:
    """
    Yield the events by which the reporter takes the steps after a run whose own process did not live to take them.

    One for each step, so that one that hangs costs itself alone. ``final``: no further attempt follows. ``late``: that
    was not known at its end, and the steps of every end have been taken.
    """
    task, about = claim.task, claim.occurrence
    if not is_accompanied(task) or not outcome.started:
        return
    for number, step in enumerate(steps_after(task, outcome.status, final=final)):
        if late and isinstance(step.item, (Hook, Ping)) and step.item.moment == "after":
            continue
        told = isinstance(step.item, (Hook, Mail))
        yield {
            "kind": "beside",
            "step": number,
            "name": step.name,
            "final": final,
            "status": outcome.status,
            "error": (outcome.error or outcome.reason) if told else "",
            "output": outcome.output if told else "",
            "seconds": outcome.seconds,
            "task": about.row,
            "due_at": about.due_at.isoformat(),
            "started_at": claim.acquired_at.isoformat(),
            "server": claim.server,
            "attempt": about.attempt,
            "fence": claim.fence,
            "key": about.key,
            "trigger": about.trigger,
        }


def with_events(tasks: Callable[[], Tasks], deliver: Deliver) -> Deliver:
    """Return what takes the step of an event of ours, and has every other event delivered."""

    def deliver_or_take(event: Event) -> None:
        if event.get("kind") == "beside":
            _take_event(event, tasks())
        else:
            deliver(event)

    return deliver_or_take


def _take_event(event: Event, tasks: Tasks) -> None:
    task = tasks.get(str(event["task"]).partition("@")[0])
    steps = steps_after(task, event["status"], final=event["final"]) if task is not None else []
    wanted = [step for step in steps[event["step"] : event["step"] + 1] if step.name == event["name"]]
    run = CurrentRun.told({**event, "name": event["task"]}, lambda: 0.0)  # it is over
    if task is None or not wanted:
        log.warning(
            "%s was left out: it is not declared in this process task=%s due=%s server=%s",
            event["name"],
            run.name,
            run.due_at.isoformat(),
            run.server,
        )
        return
    ending = Ending(event["status"], event["error"], event["output"], event["seconds"])
    before = set_current_run(run)
    try:
        Beside(task, run, most=REPORT_LIMIT).take(wanted, ending)
    finally:
        set_current_run(before)
