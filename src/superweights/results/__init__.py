"""What a run found: the record schema, how it was made, the file it is kept in, and plain tables of it."""
