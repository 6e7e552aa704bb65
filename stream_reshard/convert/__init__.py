"""A conversion: from options to a plan that is proved and fits, and from there to a checkpoint.

- conversion: the plan with everything that running it needs
- ends:       both ends of it, as the options ask for them
- notes:      facts about a conversion that a user may not expect
- report:     the plan and the summary, for people and as JSON
"""
