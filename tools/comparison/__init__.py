"""What `tools/compare` is made of: servers, clients, rows of measurements, tables and a plot."""
