"""The same results in less time: quicker blocks (blocks), recorded steps (cuda_graph), memory that is kept (malloc)."""
