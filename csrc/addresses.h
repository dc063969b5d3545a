// Where torch's tensors lie in memory, many at a time: asked one by one, Python and torch take 700 instructions for
// each.
#pragma once

#include "from_python.h"
// All others follow Python's headers, which define what the system's mean.
#include <algorithm>
#include <cstring>
#include <exception>
#include <string>

namespace bssn::python {

// The arguments: the address of torch's own function from a tensor's Python object to its memory, as torch gives it to
// the C++ that its compiler generates, and sequences of tensors. Returns the addresses one after another, as bytes.
inline PyObject* addresses(PyObject*, PyObject* const* arguments, Py_ssize_t n_arguments) {
  if (n_arguments < 1) return PyErr_Format(PyExc_TypeError, "a function and sequences of tensors belong here");
  const auto address_of = reinterpret_cast<void* (*)(PyObject*)>(argument<void*>(arguments[0]));
  if (PyErr_Occurred()) return nullptr;
  Py_ssize_t total = 0;
  for (Py_ssize_t i = 1; i < n_arguments; ++i) {
    const Py_ssize_t size = PySequence_Size(arguments[i]);
    if (size < 0) return nullptr;
    total += size;
  }
  PyObject* const bytes = PyBytes_FromStringAndSize(nullptr, total * Py_ssize_t(sizeof(void*)));
  if (bytes == nullptr) return nullptr;
  char* place = PyBytes_AsString(bytes);
  for (Py_ssize_t i = 1; i < n_arguments; ++i) {
    const Py_ssize_t size = PySequence_Size(arguments[i]);
    for (Py_ssize_t j = 0; j < size && total > 0; ++j, --total) {
      PyObject* const tensor = PySequence_GetItem(arguments[i], j);
      const void* address = nullptr;
      try {
        if (tensor != nullptr) address = address_of(tensor);
      } catch (const std::exception& error) {  // of what is no tensor, or has no memory
        std::string words(error.what());
        words.resize(std::min(words.find('\n'), words.size()));  // what follows is for debuggers
        PyErr_SetString(PyExc_RuntimeError, words.c_str());
      }
      Py_XDECREF(tensor);
      if (PyErr_Occurred()) {
        Py_DECREF(bytes);
        return nullptr;
      }
      std::memcpy(place, &address, sizeof address);
      place += sizeof address;
    }
  }
  return bytes;
}

}  // namespace bssn::python
