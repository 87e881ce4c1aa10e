"""`quorum submit`: a run as a job of a Ray cluster, from the user's working directory."""
