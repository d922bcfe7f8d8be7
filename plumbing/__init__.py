"""Machinery that the method does not know. (This file keeps other packages of the name away.)"""
