"""Context parallelism: who holds which tokens and heads, and the talk between ranks. Knows q, k, v and never a module."""
