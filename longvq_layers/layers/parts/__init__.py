"""Parts of blocks that treat every position alike: norms, dropout, feed-forward, gates."""
