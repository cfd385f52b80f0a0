"""`dat bench`: measurements that users run on their own machines. The project's own are in benchmarks/."""
