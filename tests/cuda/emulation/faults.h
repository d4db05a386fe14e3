#pragma once

#include <string>

// Runs the faulty kernel of that name on 64 threads; out: float [64].
void run_fault(const std::string& name, float* out);
