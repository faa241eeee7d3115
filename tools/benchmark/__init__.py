"""Does a start help? What is trained (task), the trainings (runs), and the answer (verdict)."""
