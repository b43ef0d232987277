"""Pictures of results: charts over records, and the files they are saved in. Never loads a model."""
