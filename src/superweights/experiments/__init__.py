"""One file per question: settings, and a generator of records."""
