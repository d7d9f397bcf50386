"""What a run needs before it starts: rows, forwards, bytes and hours, computed without weights."""
