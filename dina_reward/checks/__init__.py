"""What is checked before it is used: single values, and what files say of themselves.

Nothing here knows what a value or a file is for; what belongs together is checked where it is used. Begin at
`values.check_fields` and `stored.check_same`.
"""
