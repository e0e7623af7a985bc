"""eval/tasks"""
