"""Looking into networks: features and summaries."""
