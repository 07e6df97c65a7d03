"""What the benchmarks share: arguments, timing, memory of a child process, tables, results and plots."""
