"""shardkit in web frameworks. Each module needs its framework, and is imported by who uses it."""
