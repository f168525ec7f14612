"""Forward passes over a model: teacher-forced scores and generated answers."""
