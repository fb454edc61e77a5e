"""The tests, and the drill: python -m tests.drill"""
