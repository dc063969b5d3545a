// Makes a function of C++ one of Python's, with CPython's stable interface alone, so that one build serves every
// version of Python from 3.10 on. Arguments are integers, addresses as integers or as the bytes that lie there, floats,
// truth values and text.
#pragma once

#include <Python.h>

#include <cstdint>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

namespace bssn::python {

template <class T>
T argument(PyObject* object) {
  if (PyErr_Occurred()) return T{};  // an earlier argument's
  if constexpr (std::is_same_v<T, double>) {
    return PyFloat_AsDouble(object);
  } else if constexpr (std::is_same_v<T, bool>) {
    return PyObject_IsTrue(object) == 1;
  } else if constexpr (std::is_same_v<T, const char*>) {
    return PyUnicode_AsUTF8AndSize(object, nullptr);
  } else if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(PyBytes_Check(object) ? PyBytes_AsString(object) : PyLong_AsVoidPtr(object));
  } else {
    const long long value = PyLong_AsLongLong(object);
    if (static_cast<long long>(static_cast<T>(value)) != value)
      PyErr_SetString(PyExc_OverflowError, "an integer is too large for this argument");
    return static_cast<T>(value);
  }
}

inline PyObject* result(bool value) { return PyBool_FromLong(value); }
inline PyObject* result(int value) { return PyLong_FromLong(value); }
inline PyObject* result(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* result(const char* value) { return PyUnicode_FromString(value); }

template <auto function>
struct Call;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Call<function> {
  static PyObject* from_python(PyObject*, PyObject* const* objects, Py_ssize_t n) {
    if (n != Py_ssize_t(sizeof...(Arguments)))
      return PyErr_Format(PyExc_TypeError, "%zd arguments where %zd belong", n, Py_ssize_t(sizeof...(Arguments)));
    return with(objects, std::index_sequence_for<Arguments...>());
  }

  template <size_t... j>
  static PyObject* with([[maybe_unused]] PyObject* const* objects, std::index_sequence<j...>) {
    const std::tuple<Arguments...> arguments{argument<Arguments>(objects[j])...};
    if (PyErr_Occurred()) return nullptr;
    Result value{};
    bool enough_memory = true;
    PyThreadState* const thread = PyEval_SaveThread();  // others may run Python meanwhile
    try {
      value = std::apply(function, arguments);
    } catch (const std::bad_alloc&) {
      enough_memory = false;
    }
    PyEval_RestoreThread(thread);
    return enough_memory ? result(value) : PyErr_NoMemory();
  }
};

// One line of a module's table, for a function of Python's objects.
inline PyMethodDef entry(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t),
                         const char* doc) {
  void (*const any)() = reinterpret_cast<void (*)()>(function);
  return {name, reinterpret_cast<PyCFunction>(any), METH_FASTCALL, doc};
}

// For any other function.
template <auto function>
PyMethodDef entry(const char* name, const char* doc) {
  return entry(name, &Call<function>::from_python, doc);
}

}  // namespace bssn::python
