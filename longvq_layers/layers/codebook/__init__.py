"""The codebook that quantises keys: learning, k-means start, sums over data-parallel ranks, loading."""
