"""What ``shardkit demo`` runs: real flight data on a real cluster, or on SQLite files."""
