"""`dat bench`: measurements for users to run on their machines. The project's own benchmarks are in benchmarks/."""
