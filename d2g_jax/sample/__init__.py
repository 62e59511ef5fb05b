"""Drawing from a teacher, a student or an export."""
