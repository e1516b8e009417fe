"""Where a reward's backbone comes from: a generator in memory, whose weights it copies or shares, or weights on disk.

What is particular to one model is its family's, and nothing here trains or scores. Begin at `attach.attach_backbone`;
`structures` and `cards` say what published models are and what a reward on them costs.
"""
