"""A reward as verl's users write them for `custom_reward_function.path`; nothing in it knows of Fledge."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    digits = sum(c.isdigit() for c in solution_str)
    return {"score": digits / max(len(solution_str), 1), "has_answer": float(ground_truth in solution_str)}
