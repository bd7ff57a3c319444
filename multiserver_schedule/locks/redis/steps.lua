-- The steps of the lock, each atomic. KEYS[1] is what all keys of one lock begin with, ARGV[1] the step, ARGV[2] what it
-- is given, as JSON. Times are whole microseconds since the epoch, as texts: cjson and tostring() lose digits.
local BASE = KEYS[1]
local given = cjson.decode(ARGV[2])

-- counter, run_id, hold, rows, stamp, broken, paused_at, paused_reason, resumed, interrupted_at
local STATE = BASE .. 'state'
local VERSIONS = BASE .. 'versions' -- version:<key> = first_seen_at:scope, seen:<key>, resync:<key>, newest:<scope>
local NAMES = BASE .. 'names'
local DUE = BASE .. 'due' -- every row, by the earliest of next, retry and wanted
local ENDS = BASE .. 'ends' -- of the leases that rows show
local RUNS = BASE .. 'runs' -- owner of a run that may overlap -> its values, as JSON
local RUN_ENDS = BASE .. 'run_ends'
local ENDED = BASE .. 'ended' -- owners of such runs that were released, for an hour
local REAPED = BASE .. 'reaped' -- owner -> a clean-up that is not recorded yet, as JSON
local NOTHING = BASE .. 'nothing'

-- Both lists are known to rows.py, by position. A row that was written by an older release lacks some of these fields.
local ROW = {
  'fingerprint', 'last', 'since', 'next', 'not_before', 'hold', 'owner', 'server', 'fence', 'acquired', 'renewed',
  'expires', 'finish_by', 'due', 'cancelled', 'paused_at', 'paused_reason', 'attempt', 'trigger', 'rerun_up_to',
  'retry', 'wanted', 'asked', 'moved_to', 'moved_from', 'lost', 'lost_since',
}
local SYNCED = {
  'fingerprint', 'last', 'since', 'next', 'not_before', 'hold', 'fence', 'paused_at', 'paused_reason', 'attempt',
  'trigger', 'rerun_up_to', 'retry', 'wanted', 'moved_to', 'moved_from', 'lost', 'lost_since',
}
local LAST = 2
local AT = {} -- where each field stands in ROW
for i, field in ipairs(ROW) do
  AT[field] = i
end
local HOUR = 3600 * 1000000

local function text(number)
  return string.format('%.0f', number)
end

local function number(value)
  return tonumber(value) or 0
end

local function key_of(name)
  return BASE .. 'row:' .. name
end

local function values_of(name)
  local values = redis.call('HMGET', key_of(name), unpack(ROW))
  if not values[LAST] then
    return nil
  end
  for i = 1, #ROW do
    values[i] = values[i] or ''
  end
  return values
end

local function row_of(name)
  local values = values_of(name)
  if not values then
    return nil
  end
  local row = {}
  for i, field in ipairs(ROW) do
    row[field] = values[i]
  end
  return row
end

local function list_of(name)
  local values = values_of(name)
  if values then
    table.insert(values, 1, name)
  end
  return values
end

local N
if given.now ~= nil and given.now ~= '' then
  N = tonumber(given.now)
else
  local time = redis.call('TIME')
  N = tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- The first command that writes is refused when the memory is full, and no later one: this one needs no memory. It also
-- tells a replica, whose reads must not pass for health.
local function write_anyway()
  redis.call('DEL', NOTHING)
end

local run_id
local function is_synced()
  local info = redis.call('INFO', 'server')
  run_id = string.match(info, 'run_id:(%w+)')
  if redis.call('HGET', STATE, 'run_id') == run_id then
    return true
  end
  -- Rarely so: the place for what need not be asked each time.
  local version = string.match(info, 'redis_version:([%d.]+)') or '?'
  if number(string.match(version, '^%d+')) < 6 then
    error('lock-on-old-server:' .. version)
  end
  local role = string.match(redis.call('INFO', 'replication'), 'role:(%w+)')
  if role ~= 'master' then
    error('lock-on-replica')
  end
  return false
end

-- Put the row where a look finds it: with its next due time, a retry that it owes, or a run that was asked for.
local function index(name, row)
  local first
  if row.moved_to == '' then
    for _, field in ipairs({'next', 'retry', 'wanted'}) do
      local at = tonumber(row[field])
      if at and (not first or at < first) then
        first = at
      end
    end
  end
  redis.call('ZADD', DUE, first and text(first) or '+inf', name)
end

local function reindex(name)
  index(name, row_of(name))
end

-- Is everything paused?
local function is_paused()
  local since = redis.call('HGET', STATE, 'paused_at')
  return since and since ~= ''
end

-- Fences come from other stores, too, and may have more digits than a number of Lua has: they stay texts.
local function is_lower(fence, other)
  if #fence ~= #other then
    return #fence < #other
  end
  return fence < other
end

local function next_fence(fence)
  if fence == '' or is_lower(fence, text(N)) then
    return text(N)
  end
  local head, digit, nines = string.match(fence, '^(%d-)(%d)(9*)$')
  if digit == '9' then -- nothing but nines
    return '1' .. string.rep('0', #fence)
  end
  return head .. text(tonumber(digit) + 1) .. string.rep('0', #nines)
end

local function note_loss()
  redis.call('HSET', STATE, 'broken', '1')
end

local function add_run(owner, run, expires)
  redis.call('HSET', RUNS, owner, cjson.encode(run))
  redis.call('ZADD', RUN_ENDS, expires, owner)
end

local steps = {}

function steps.clock()
  return {text(N)}
end

function steps.look()
  write_anyway()
  local state = redis.call('HMGET', STATE, 'paused_at', 'interrupted_at', 'rows', 'broken')
  local paused, interrupted = state[1] or '', state[2] or ''
  if not is_synced() then
    return {text(N), '0', paused, interrupted, '0', {}, {}}
  end

  local notes = {}
  local flat = redis.call('HGETALL', VERSIONS)
  for i = 1, #flat, 2 do
    notes[flat[i]] = flat[i + 1]
  end
  local names = redis.call('SCARD', NAMES)
  local whole = not state[4]
    and names == redis.call('ZCARD', DUE)
    and names == tonumber(state[3] or -1)
    and redis.call('HLEN', RUNS) == redis.call('ZCARD', RUN_ENDS)
  for i, key in ipairs(given.keys) do
    if notes['newest:' .. given.scopes[i]] == key and number(notes['seen:' .. key]) <= N - given.seen_every then
      redis.call('HSET', VERSIONS, 'seen:' .. key, text(N))
      notes['seen:' .. key] = text(N)
    end
    if notes['resync:' .. key] then
      whole = false
    end
  end
  local versions = {}
  for field, value in pairs(notes) do
    local key = string.match(field, '^version:(.*)$')
    if key then
      local first, scope = string.match(value, '^(%d+):(.*)$')
      if scope == '' or scope == given.server then
        versions[#versions + 1] = {key, scope, first, notes['seen:' .. key] or ''}
      end
    end
  end

  local expired = redis.call('HLEN', REAPED) > 0 or redis.call('ZCOUNT', RUN_ENDS, '-inf', text(N)) > 0
  if not expired then
    for _, name in ipairs(redis.call('ZRANGEBYSCORE', ENDS, '-inf', text(N))) do
      -- Before the hold is over its owner may come back.
      if number(redis.call('HGET', key_of(name), 'hold')) <= N then
        expired = true
        break
      end
    end
  end
  local due = {}
  if paused == '' then
    local found = redis.call('ZRANGEBYSCORE', DUE, '-inf', text(N + given.ahead), 'WITHSCORES')
    for i = 1, #found, 2 do
      local name, first = found[i], tonumber(found[i + 1])
      local row = values_of(name)
      if not row then
        whole = false
      else
        if row[AT.owner] ~= '' and number(row[AT.expires]) <= N and number(row[AT.hold]) <= N and first <= N then
          -- Seen without the set of ends, too, which may be lost.
          expired = true
        end
        local on = string.match(name, '@(.*)$')
        if (on == nil or on == given.server) and row[AT.paused_at] == '' and row[AT.moved_to] == '' then
          table.insert(row, 1, name)
          due[#due + 1] = row
        end
      end
    end
  end
  return {text(N), whole and '1' or '0', paused, interrupted, expired and '1' or '0', versions, due}
end

-- -- sync: mend.py computes, on what is read here; what it has written is refused when that has changed ---------------

function steps.survey()
  write_anyway()
  is_synced()
  return {
    text(N),
    run_id,
    redis.call('HGETALL', STATE),
    redis.call('HGETALL', VERSIONS),
    redis.call('SMEMBERS', NAMES),
    redis.call('ZRANGE', DUE, 0, -1),
    redis.call('HLEN', RUNS) == redis.call('ZCARD', RUN_ENDS) and '1' or '0',
  }
end

function steps.names()
  return redis.call('SMEMBERS', NAMES)
end

function steps.rows()
  local found = {}
  for _, name in ipairs(given.names) do
    found[#found + 1] = list_of(name)
  end
  return found
end

local function guard_of(name)
  local values = redis.call('HMGET', key_of(name), unpack(SYNCED))
  if not values[LAST] then
    return ''
  end
  for i = 1, #SYNCED do
    values[i] = values[i] or ''
  end
  return table.concat(values, '|')
end

function steps.write()
  is_synced()
  if given.adopt and redis.call('HGET', STATE, 'stamp') == given.adopt.stamp then
    -- Sent before, and its answer did not arrive.
    return {'ok'}
  end
  if run_id ~= given.run_id or (redis.call('HGET', STATE, 'counter') or '') ~= given.counter then
    return {'conflict'}
  end
  for _, item in ipairs(given.rows) do
    if guard_of(item[1]) ~= item[2] then
      return {'conflict'}
    end
  end
  for scope, key in pairs(given.adopt and given.adopt.newest or {}) do
    if redis.call('HGET', VERSIONS, 'newest:' .. scope) ~= key then
      return {'conflict'}
    end
  end
  for _, item in ipairs(given.rows) do
    local name, values = item[1], item[3]
    local fields = {}
    for i, field in ipairs(SYNCED) do
      fields[#fields + 1] = field
      fields[#fields + 1] = values[i]
    end
    redis.call('HSET', key_of(name), unpack(fields))
    redis.call('SADD', NAMES, name)
    local row = row_of(name)
    index(name, row)
    if row.owner ~= '' then
      redis.call('ZADD', ENDS, row.expires, name)
    end
  end
  if not given.adopt then
    return {'ok'}
  end
  local adopt = given.adopt
  for _, version in ipairs(adopt.versions) do
    local key, scope, first, seen = version[1], version[2], version[3], version[4]
    redis.call('HSET', VERSIONS, 'version:' .. key, first .. ':' .. scope, 'seen:' .. key, seen, 'newest:' .. scope, key)
  end
  for _, key in ipairs(adopt.resync) do
    redis.call('HSET', VERSIONS, 'resync:' .. key, '1')
  end
  for _, key in ipairs(adopt.done) do
    redis.call('HDEL', VERSIONS, 'resync:' .. key)
  end
  for _, version in ipairs(adopt.forget) do
    local key, scope = version[1], version[2]
    redis.call('HDEL', VERSIONS, 'version:' .. key, 'seen:' .. key, 'resync:' .. key)
    if redis.call('HGET', VERSIONS, 'newest:' .. scope) == key then
      redis.call('HDEL', VERSIONS, 'newest:' .. scope)
    end
  end
  for _, owner in ipairs(redis.call('ZRANGE', RUN_ENDS, 0, -1)) do
    if redis.call('HEXISTS', RUNS, owner) == 0 then
      redis.call('ZREM', RUN_ENDS, owner)
    end
  end
  for _, owner in ipairs(redis.call('HKEYS', RUNS)) do
    if not redis.call('ZSCORE', RUN_ENDS, owner) then
      redis.call('ZADD', RUN_ENDS, adopt.runs_end, owner)
    end
  end
  redis.call('HDEL', STATE, 'broken')
  redis.call(
    'HSET', STATE, 'run_id', run_id, 'hold', adopt.hold, 'rows', redis.call('SCARD', NAMES),
    'stamp', adopt.stamp,
    'counter', text(math.max(number(given.counter) + 1, N))
  )
  return {'ok'}
end

-- -- claim and skip ---------------------------------------------------------------------------------------------------

local function held_by(server)
  local held = 0
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', ENDS, '(' .. text(N), '+inf')) do
    local row = redis.call('HMGET', key_of(name), 'owner', 'server')
    if row[1] and row[1] ~= '' and row[2] == server then
      held = held + 1
    end
  end
  for _, owner in ipairs(redis.call('ZRANGEBYSCORE', RUN_ENDS, '(' .. text(N), '+inf')) do
    local run = redis.call('HGET', RUNS, owner)
    if run and cjson.decode(run)[3] == server then
      held = held + 1
    end
  end
  return held
end

-- What a claim that stands is told as; nil when this owner holds nothing.
local function standing(name, owner, may_overlap)
  if may_overlap then
    local run = redis.call('HGET', RUNS, owner)
    local expires = run and redis.call('ZSCORE', RUN_ENDS, owner)
    if not expires then
      return nil
    end
    run = cjson.decode(run)
    return {owner, run[4], run[5], text(tonumber(expires)), run[6]}
  end
  local row = row_of(name)
  if not row or row.owner ~= owner then
    return nil
  end
  return {owner, row.fence, row.acquired, row.expires, row.finish_by}
end

local function take(item, row)
  local name, due, hint, lease, limit, owner = item[1], item[2], item[3], item[4], item[5], item[6]
  local may_overlap, by_hand, requested, is_retry = item[8], item[9], item[10], item[11]
  local trigger, rerun_up_to = item[13], item[14]
  local key = key_of(name)
  local fence = next_fence(row.fence)
  local expires = text(N + tonumber(lease))
  local finish_by = limit ~= '' and text(N + tonumber(limit)) or ''
  local fields = {}
  local function put(field, value)
    fields[#fields + 1] = field
    fields[#fields + 1] = value
    row[field] = value
  end
  put('fence', fence)
  put('cancelled', '')
  put('rerun_up_to', rerun_up_to)
  if requested then
    put('wanted', '')
  elseif is_retry then
    put('retry', '')
  elseif not by_hand then
    put('last', due)
    put('next', hint)
    put('attempt', '1')
    put('trigger', trigger)
    put('retry', '')
  end
  if not may_overlap then
    put('owner', owner)
    put('server', given.server)
    put('acquired', text(N))
    put('renewed', text(N))
    put('expires', expires)
    put('finish_by', finish_by)
    put('due', due)
  end
  -- The first write: when the memory is full, it is refused, and nothing is changed.
  redis.call('HSET', key, unpack(fields))
  index(name, row)
  if may_overlap then
    add_run(owner, {name, due, given.server, fence, text(N), finish_by}, expires)
  else
    redis.call('ZADD', ENDS, expires, name)
  end
  return {owner, fence, text(N), expires, finish_by}
end

-- May this be claimed, as far as its kind goes? A run that somebody started by hand may always.
local function is_open(item, row, all_paused)
  local due, fingerprint, by_hand, requested, is_retry = tonumber(item[2]), item[7], item[9], item[10], item[11]
  if by_hand and not requested then
    return true
  end
  if all_paused or row.paused_at ~= '' then
    return false
  end
  if requested then
    return tonumber(row.wanted) == due
  end
  if row.fingerprint ~= fingerprint then
    return false
  end
  if is_retry then
    return number(row.last) == due and row.attempt == item[12] and row.retry ~= '' and tonumber(row.retry) <= N
  end
  return number(row.last) < due and due <= N and number(row.not_before) <= N
end

function steps.claim()
  if not is_synced() then
    return {text(N), {}}
  end
  local won, tried, open = {}, {}, {}
  local lost = false
  -- What was won when the same claim came before, and its answer did not arrive, needs no slot.
  for _, item in ipairs(given.items) do
    local name = item[1]
    if not tried[name] then
      tried[name] = true
      local before = standing(name, item[6], item[8])
      if before then
        won[#won + 1] = before
      else
        open[#open + 1] = item
      end
    end
  end
  local free = #open
  if given.slots ~= '' and free > 0 then
    free = tonumber(given.slots) - held_by(given.server)
  end
  local all_paused = is_paused()
  for _, item in ipairs(open) do
    if free <= 0 then
      break
    end
    local row = row_of(item[1])
    if not row then
      lost = true
    else
      local may_overlap = item[8]
      if row.moved_to == '' and row.moved_from == '' and number(row.hold) <= N and (may_overlap or row.owner == '')
        and is_open(item, row, all_paused)
      then
        won[#won + 1] = take(item, row)
        free = free - 1
      end
    end
  end
  if lost then
    note_loss()
  end
  return {text(N), won}
end

function steps.settle()
  local found = {}
  for _, item in ipairs(given.items) do
    found[#found + 1] = standing(item[1], item[2], item[3])
  end
  return {text(N), found}
end

function steps.skip()
  write_anyway()
  local given_up = {}
  if not is_synced() then
    return {text(N), given_up}
  end
  if is_paused() then
    return {text(N), given_up}
  end
  local tried = {}
  for i, item in ipairs(given.items) do
    local name, due, hint, fingerprint, held = item[1], item[2], item[3], item[4], item[5]
    local row = not tried[name] and row_of(name)
    tried[name] = true
    if row then
      local at = tonumber(due)
      if redis.call('HGET', key_of(name), 'stamp') == given.stamp then
        -- Sent before, and its answer did not arrive.
        given_up[#given_up + 1] = {text(i), row.server, row.acquired}
      elseif at <= N and number(row.last) < at and row.fingerprint == fingerprint and row.paused_at == ''
        and row.moved_to == '' and row.moved_from == ''
        and (not held or (row.owner ~= '' and number(row.expires) > N and number(row.renewed) >= at))
      then
        redis.call(
          'HSET', key_of(name), 'last', due, 'next', hint, 'retry', '', 'rerun_up_to', '0', 'stamp', given.stamp
        )
        reindex(name)
        given_up[#given_up + 1] = {text(i), row.server, row.acquired}
      end
    end
  end
  return {text(N), given_up}
end

-- -- renew and release ------------------------------------------------------------------------------------------------

function steps.renew()
  write_anyway()
  local missed, cancelled = {}, {}
  for i, item in ipairs(given.items) do
    local name, owner, lease, may_overlap = item[1], item[2], tonumber(item[3]), item[4]
    local expires = text(N + lease)
    if may_overlap then
      if redis.call('HEXISTS', RUNS, owner) == 1 then
        redis.call('ZADD', RUN_ENDS, expires, owner)
      else
        missed[#missed + 1] = text(i)
      end
    else
      local row = redis.call('HMGET', key_of(name), 'owner', 'cancelled')
      if row[1] ~= owner then
        missed[#missed + 1] = text(i)
      elseif row[2] and row[2] ~= '' then
        cancelled[#cancelled + 1] = text(i)
      else
        redis.call('HSET', key_of(name), 'renewed', text(N), 'expires', expires)
        redis.call('ZADD', ENDS, expires, name)
      end
    end
  end
  return {text(N), missed, cancelled}
end

-- A live owner puts itself back where its row was lost, or shows an older state. Only while its own lease stands, so that
-- nobody can have taken over: what is lost is held back for a lease, and so is everything until a restart is synced.
function steps.come_back()
  write_anyway()
  local synced = is_synced()
  local back = {}
  for i, item in ipairs(given.items) do
    local name, owner, fence, lease, until_ = item[1], item[2], item[3], tonumber(item[4]), tonumber(item[5])
    local due, server, acquired, finish_by, may_overlap = item[6], item[7], item[8], item[9], item[10]
    local by_hand, fingerprint, hint = item[11], item[12], item[13]
    local expires = text(N + lease)
    if until_ > N and may_overlap then
      if redis.call('ZSCORE', ENDED, owner) == false then
        add_run(owner, {name, due, server, fence, acquired, finish_by}, expires)
        back[#back + 1] = text(i)
      end
    elseif until_ > N then
      local row = row_of(name)
      local key = key_of(name)
      local may = false
      if not row then
        may = true
        local last = by_hand and N or math.max(N, tonumber(due))
        -- An early hint costs a look; none at all would cost every due time.
        local soon = hint ~= '' and tonumber(hint) > last and hint or text(last)
        redis.call(
          'HSET', key, 'fingerprint', fingerprint, 'last', text(last), 'since', text(last), 'next', soon,
          'not_before', text(N), 'fence', fence, 'lost', 'renew', 'lost_since', by_hand and '' or due
        )
        redis.call('SADD', NAMES, name)
        redis.call('HSET', STATE, 'rows', redis.call('SCARD', NAMES))
        note_loss()
        row = row_of(name)
        index(name, row)
      elseif not synced or number(row.hold) > N then
        local gone = redis.call('HMGET', key, 'released', 'freed')
        may = (row.owner == '' or is_lower(row.fence, fence)) and gone[1] ~= owner and gone[2] ~= owner
      end
      if may then
        redis.call(
          'HSET', key, 'owner', owner, 'server', server, 'acquired', acquired, 'renewed', text(N), 'expires', expires,
          'finish_by', finish_by, 'due', due, 'cancelled', '',
          'fence', is_lower(row.fence, fence) and fence or row.fence
        )
        redis.call('ZADD', ENDS, expires, name)
        back[#back + 1] = text(i)
      end
    end
  end
  return {text(N), back}
end

local function set_free(name, ...)
  redis.call(
    'HSET', key_of(name), 'owner', '', 'server', '', 'acquired', '', 'renewed', '', 'expires', '', 'finish_by', '',
    'due', '', 'cancelled', '', ...
  )
  redis.call('ZREM', ENDS, name)
end

-- Have the row owe another attempt of its last due time, from then on.
local function owe(name, at, attempt)
  redis.call('HSET', key_of(name), 'retry', text(at), 'attempt', text(attempt))
  reindex(name)
end

function steps.release()
  write_anyway()
  local told = {}
  for i, item in ipairs(given.items) do
    local name, owner, rest, may_overlap = item[1], item[2], item[3], item[4]
    local due, retry_in, attempt = item[5], item[6], item[7]
    local how = 'lost'
    if may_overlap then
      if redis.call('HDEL', RUNS, owner) == 1 then
        redis.call('ZREM', RUN_ENDS, owner)
        redis.call('ZADD', ENDED, text(N), owner)
        how = 'freed'
      elseif redis.call('ZSCORE', ENDED, owner) then
        how = 'before'
      end
    else
      local row = redis.call('HMGET', key_of(name), 'owner', 'released')
      if row[1] == owner then
        set_free(name, 'released', owner)
        if rest ~= '' then
          redis.call('HSET', key_of(name), 'not_before', text(N + tonumber(rest)))
        end
        how = 'freed'
      elseif row[2] == owner then
        how = 'before'
      end
    end
    if how == 'freed' and retry_in ~= '' then
      local row = row_of(name)
      local at = N + tonumber(retry_in)
      if row and row.last == due and (row.next == '' or tonumber(row.next) > at) then
        owe(name, at, tonumber(attempt) + 1)
      end
    end
    told[i] = how
  end
  redis.call('ZREMRANGEBYSCORE', ENDED, '-inf', text(N - HOUR))
  return {text(N), told}
end

-- -- clean-ups --------------------------------------------------------------------------------------------------------

local function note_cleanup(name, due, server, owner, fence, acquired, expires, reason)
  local note = cjson.encode({name, due, server, owner, fence, acquired, expires, text(N), given.server, reason})
  redis.call('HSET', REAPED, owner, note)
  return note
end

local function why(finish_by)
  return finish_by ~= '' and tonumber(finish_by) <= N and 'overran' or 'lease_expired'
end

function steps.reap()
  write_anyway()
  local freed = {}
  if is_synced() then
    local function reap(name)
      local row = row_of(name)
      if not row or row.owner == '' then
        redis.call('ZREM', ENDS, name)
      elseif number(row.expires) > N then
        redis.call('ZADD', ENDS, row.expires, name)
      elseif number(row.hold) <= N then
        note_cleanup(
          name, row.due, row.server, row.owner, row.fence, row.acquired, row.expires, why(row.finish_by)
        )
        set_free(name, 'fence', next_fence(row.fence), 'rerun_up_to', '0')
        local attempt = tonumber(row.attempt) or 1
        -- The due time that ran is no longer the last one where a loss or the end of a pause has moved that on.
        if number(row.rerun_up_to) > attempt and row.due == row.last and (row.next == '' or tonumber(row.next) > N) then
          owe(name, N, attempt + 1)
        end
        freed[#freed + 1] = row.owner
      end
    end
    for _, name in ipairs(redis.call('ZRANGEBYSCORE', ENDS, '-inf', text(N))) do
      if #freed >= given.most then
        break
      end
      reap(name)
    end
    for _, owner in ipairs(redis.call('ZRANGEBYSCORE', RUN_ENDS, '-inf', text(N))) do
      if #freed >= given.most then
        break
      end
      local run = redis.call('HGET', RUNS, owner)
      if run then
        run = cjson.decode(run)
        local expires = text(tonumber(redis.call('ZSCORE', RUN_ENDS, owner)))
        note_cleanup(run[1], run[2], run[3], owner, run[4], run[5], expires, why(run[6]))
        redis.call('HDEL', RUNS, owner)
        freed[#freed + 1] = owner
      end
      redis.call('ZREM', RUN_ENDS, owner)
    end
    for _, name in ipairs(redis.call('ZRANGEBYSCORE', DUE, '-inf', text(N))) do
      if #freed >= given.most then
        break
      end
      local row = redis.call('HMGET', key_of(name), 'owner', 'expires')
      if row[1] and row[1] ~= '' and number(row[2]) <= N then
        reap(name)
      end
    end
  end
  return {text(N), freed, redis.call('HVALS', REAPED)}
end

function steps.recorded()
  write_anyway()
  for _, owner in ipairs(given.owners) do
    redis.call('HDEL', REAPED, owner)
  end
  return {text(N)}
end

function steps.free()
  write_anyway()
  local row = row_of(given.name)
  if not row or row.owner == '' or (given.owner ~= '' and row.owner ~= given.owner) then
    return {text(N), ''}
  end
  local note = note_cleanup(
    given.name, row.due, row.server, row.owner, row.fence, row.acquired, row.expires, 'released_by_hand'
  )
  set_free(given.name, 'fence', next_fence(row.fence), 'freed', row.owner, 'rerun_up_to', '0')
  return {text(N), note}
end

-- -- what people ask for ----------------------------------------------------------------------------------------------

function steps.pause()
  write_anyway()
  if not given.names then
    if not is_paused() then
      redis.call('HSET', STATE, 'paused_at', text(N))
    end
    redis.call('HSET', STATE, 'paused_reason', given.reason)
    return {text(N), {}}
  end
  local there = {}
  for _, name in ipairs(given.names) do
    local row = row_of(name)
    if row then
      redis.call(
        'HSET', key_of(name), 'paused_at', row.paused_at == '' and text(N) or row.paused_at,
        'paused_reason', given.reason
      )
      there[#there + 1] = name
    end
  end
  return {text(N), there}
end

function steps.paused()
  write_anyway()
  return {text(N), redis.call('HGET', STATE, 'paused_at') or '', redis.call('SMEMBERS', NAMES)}
end

-- What is paused is not claimed while its next due time is computed.
function steps.resume()
  write_anyway()
  local resumed = {}
  local is_again = redis.call('HGET', STATE, 'resumed') == given.stamp
  if given.everything and not is_paused() and not is_again then
    -- Somebody else was faster.
    return {text(N), resumed}
  end
  for _, item in ipairs(given.rows) do
    local name, fingerprint, hint, was_due = item[1], item[2], item[3], item[4]
    local row = row_of(name)
    if row and redis.call('HGET', key_of(name), 'stamp') == given.stamp then
      -- Sent before, and its answer did not arrive.
      resumed[#resumed + 1] = name
    elseif row and (given.everything or row.paused_at ~= '') then
      local put = {}
      if row.moved_to == '' and was_due then
        local last = text(math.max(number(row.last), tonumber(given.at)))
        -- One of another schedule may be too late; one that is too early costs a look.
        local soon = row.fingerprint == fingerprint and hint ~= '' and hint or row.next
        put = {'last', last, 'next', soon, 'retry', '', 'rerun_up_to', '0'}
      end
      if not given.everything then
        row.paused_at = ''
      end
      if row.paused_at == '' then
        resumed[#resumed + 1] = name
        for _, value in ipairs({'paused_at', '', 'paused_reason', '', 'stamp', given.stamp}) do
          put[#put + 1] = value
        end
      end
      if #put > 0 then
        redis.call('HSET', key_of(name), unpack(put))
      end
      reindex(name)
    end
  end
  if given.is_last and not is_again then
    redis.call('HSET', STATE, 'paused_at', '', 'paused_reason', '', 'resumed', given.stamp)
  end
  return {text(N), resumed}
end

function steps.interrupt()
  write_anyway()
  redis.call('HSET', STATE, 'interrupted_at', text(N))
  return {text(N)}
end

function steps.want()
  write_anyway()
  local synced = is_synced()
  local row = row_of(given.name)
  if not row or row.moved_to ~= '' or row.moved_from ~= '' or row.paused_at ~= '' or is_paused() then
    return {text(N), ''}
  end
  local at, stamp, asked_in = string.match(row.asked, '^(%d+):([^:]*):(.*)$')
  if stamp == given.stamp then
    -- Sent before, and its answer did not arrive: the run may have begun.
    return {text(N), at}
  end
  -- What was asked for before a restart that nobody has put right will be dropped by that.
  if row.wanted ~= '' and (synced or asked_in == run_id) then
    return {text(N), row.wanted}
  end
  row.wanted = text(N)
  redis.call(
    'HSET', key_of(given.name), 'wanted', row.wanted, 'asked', row.wanted .. ':' .. given.stamp .. ':' .. run_id
  )
  index(given.name, row)
  return {text(N), row.wanted}
end

function steps.cancel()
  write_anyway()
  local held = {}
  for _, item in ipairs(given.items) do
    local name, owner = item[1], item[2]
    local row = redis.call('HMGET', key_of(name), 'owner', 'cancelled')
    if row[1] == owner then
      if not row[2] or row[2] == '' then
        redis.call('HSET', key_of(name), 'cancelled', text(N))
      end
      held[#held + 1] = name
    end
  end
  return {text(N), held}
end

function steps.retire()
  write_anyway()
  local retired, scopes = {}, {}
  for _, name in ipairs(given.names) do
    local row = row_of(name)
    if row and row.owner == '' then
      redis.call('HSET', key_of(name), 'next', '', 'retry', '', 'wanted', '')
      reindex(name)
      retired[#retired + 1] = name
      scopes[string.match(name, '@(.*)$') or ''] = true
    end
  end
  -- Aside (versions.py), under a name that no survey has seen: what a sync under way found of these rows is over.
  for scope in pairs(scopes) do
    local key = redis.call('HGET', VERSIONS, 'newest:' .. scope)
    local version = key and redis.call('HGET', VERSIONS, 'version:' .. key)
    if version then
      local aside = given.aside .. text(N) .. ':' .. (string.match(key, '^' .. given.aside .. '%d+:(.*)$') or key)
      redis.call(
        'HSET', VERSIONS, 'newest:' .. scope, aside, 'version:' .. aside, version,
        'seen:' .. aside, redis.call('HGET', VERSIONS, 'seen:' .. key) or ''
      )
      redis.call('HDEL', VERSIONS, 'version:' .. key, 'seen:' .. key)
    end
  end
  return {text(N), retired}
end

function steps.forget()
  write_anyway()
  local forgotten, servers = {}, {}
  for _, name in ipairs(given.names) do
    local row = row_of(name)
    local on = string.match(name, '@(.*)$')
    if row and on and row.owner == '' then
      redis.call('DEL', key_of(name))
      redis.call('ZREM', DUE, name)
      -- Counted down, not anew: a loss of other names must still be noticed.
      if redis.call('SREM', NAMES, name) == 1 and redis.call('HEXISTS', STATE, 'rows') == 1 then
        redis.call('HINCRBY', STATE, 'rows', -1)
      end
      forgotten[#forgotten + 1] = name
      servers[on] = true
    end
  end
  -- A server that comes back with the same tasks is known, and would otherwise register nothing.
  local notes = redis.call('HGETALL', VERSIONS)
  for i = 1, #notes, 2 do
    local key = string.match(notes[i], '^version:(.*)$')
    if key and servers[string.match(notes[i + 1], '^%d+:(.*)$')] then
      redis.call('HSET', VERSIONS, 'resync:' .. key, '1')
    end
  end
  return {text(N), forgotten}
end

-- Rows are computed by mend.py, on what was read; one that has changed since is told as left, to be read again.
function steps.set_right()
  write_anyway()
  local done, left = {}, {}
  for _, item in ipairs(given.items) do
    local name, guard, values = item[1], item[2], item[3]
    if redis.call('HGET', key_of(name), 'stamp') == given.stamp then
      -- Sent before, and its answer did not arrive.
      done[#done + 1] = name
    elseif guard_of(name) == guard then
      local fields = {'stamp', given.stamp}
      for i, field in ipairs(SYNCED) do
        fields[#fields + 1] = field
        fields[#fields + 1] = values[i]
      end
      redis.call('HSET', key_of(name), unpack(fields))
      reindex(name)
      done[#done + 1] = name
    else
      left[#left + 1] = name
    end
  end
  return {text(N), done, left}
end

-- What is kept beside the rows. Who runs it renews what may overlap, if it lives; else that ends a lease from now.
function steps.set_state_right()
  write_anyway()
  local function is_beyond(at)
    return at and number(at) > N + given.far
  end
  if is_beyond(redis.call('HGET', STATE, 'interrupted_at')) then
    redis.call('HSET', STATE, 'interrupted_at', text(N))
  end
  if is_beyond(redis.call('HGET', STATE, 'hold')) then
    redis.call('HSET', STATE, 'hold', text(N + given.lease))
  end
  local notes = redis.call('HGETALL', VERSIONS)
  for i = 1, #notes, 2 do
    if string.match(notes[i], '^seen:') and is_beyond(notes[i + 1]) then
      redis.call('HSET', VERSIONS, notes[i], text(N))
    end
  end
  local wanted, names = {}, {}
  for _, name in ipairs(given.names) do
    wanted[name] = true
  end
  for _, owner in ipairs(redis.call('ZRANGEBYSCORE', RUN_ENDS, '(' .. text(N + given.far), '+inf')) do
    local run = redis.call('HGET', RUNS, owner)
    local name = run and cjson.decode(run)[1]
    if name and wanted[name] then
      redis.call('ZADD', RUN_ENDS, text(N + given.lease), owner)
      names[#names + 1] = name
    end
  end
  return {text(N), names}
end

-- -- from store to store ----------------------------------------------------------------------------------------------

function steps.leave()
  write_anyway()
  local synced = is_synced()
  local left = {}
  for _, name in ipairs(given.names) do
    local row = row_of(name)
    if row and (row.moved_to == '' or row.moved_to == given.to) then
      if not synced then
        -- A restart that nobody has put right: the row may be an older one, and its owner may yet come back.
        redis.call(
          'HSET', key_of(name), 'last', text(math.max(number(row.last), N)), 'hold',
          text(math.max(number(row.hold), N + given.hold))
        )
      end
      redis.call('HSET', key_of(name), 'moved_to', given.to)
      reindex(name)
      left[#left + 1] = list_of(name)
    end
  end
  return {text(N), left}
end

function steps.arrive()
  write_anyway()
  for _, name in ipairs(given.names) do
    if redis.call('HEXISTS', key_of(name), 'last') == 1 then
      redis.call('HSET', key_of(name), 'moved_from', '')
    end
  end
  return {text(N)}
end

return steps[ARGV[1]]()
