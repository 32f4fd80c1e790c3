"""What exists for speed only. It imports torch; nothing outside changes a result by leaving it out."""
