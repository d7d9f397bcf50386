"""Groups of workers, in this process or in Ray actors, and where they are placed."""
