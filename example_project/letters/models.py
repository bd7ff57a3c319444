"""What was written: a row for each beginning, so that a letter that is written twice has two."""

from django.db import models


class Letter(models.Model):
    """A letter, as one worker wrote it."""

    number = models.PositiveIntegerField()
    worker = models.CharField(max_length=64)
    begun_at = models.DateTimeField(auto_now_add=True)
    ended_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"letter {self.number}, by {self.worker}"
