"""Two tasks that are due daily at SCENE_AT; the first has yesterday's due time to make up for."""
