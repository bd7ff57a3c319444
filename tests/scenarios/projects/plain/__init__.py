"""SCENE_TASKS tasks that take SCENE_SECONDS each; the first has a ``sleep`` beside it that does not heed TERM."""
