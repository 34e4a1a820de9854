"""Methods compared on one model: questions, marks, measures of what was kept, tables."""
