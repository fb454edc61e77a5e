"""Pages that a browser shows without any other file: of a run, and to draw with it. `files/` holds their HTML."""
