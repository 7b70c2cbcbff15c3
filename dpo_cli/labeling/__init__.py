"""People and judges vote on answers: what they are asked, in which order, and the files of their votes."""
