"""`make serve`: the broker, a worker and the front end as one process tree on one machine."""
