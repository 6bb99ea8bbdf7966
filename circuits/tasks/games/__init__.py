"""Games: finite worlds of moves with a known state behind every prefix, in engines that play them by the batch."""
