"""For every test of the harness's own: hypothesis without deadlines, since shared machines stall."""

from hypothesis import settings

settings.register_profile("steady", deadline=None)
settings.load_profile("steady")
