// Label or "abstain", and the score, from a bundle's model.onnx: the graph decides by itself.
#include <onnxruntime_cxx_api.h>

#include <iostream>
#include <map>

#include "image.hpp"

using Shape = std::vector<int64_t>;
using Options = std::map<std::string, std::string>;

template <typename Number>
Ort::Value tensor(std::vector<Number>& values, const Shape& shape) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<Number>(memory, values.data(), values.size(), shape.data(),
                                          shape.size());
}

// Throws std::exception, Ort::Exception being one.
void decide(const std::string& model, const std::string& file, Options options) {
  Image image = read_image(file);
  Ort::Env env(ORT_LOGGING_LEVEL_FATAL);
  Ort::Session session(env, model.c_str(), Ort::SessionOptions());
  const auto type = session.GetInputTypeInfo(0);
  const auto info = type.GetTensorTypeAndShapeInfo();
  const bool takes_pixels = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;

  const Shape shape = takes_pixels ? Shape{1, image.height, image.width, image.channels}
                                   : Shape{1, image.channels, image.height, image.width};
  Shape wanted = info.GetShape();
  if (!wanted.empty()) wanted[0] = 1;  // any batch is taken
  if (wanted != shape) {
    std::string text = file + " is " + std::to_string(image.width) + " wide, " +
                       std::to_string(image.height) + " high, with " +
                       std::to_string(image.channels) + " channels; resize it to the model's input, ";
    for (size_t i = 0; i < wanted.size(); ++i) text += (i ? "x" : "") + std::to_string(wanted[i]);
    throw std::runtime_error(text);
  }

  std::vector<const char*> names{"input"};
  std::vector<Ort::Value> feeds;
  std::vector<float> values, threshold;
  if (!takes_pixels)
    values = normalise(image, numbers("mean", options["mean"]), numbers("std", options["std"]));
  feeds.push_back(takes_pixels ? tensor(image.pixels, shape) : tensor(values, shape));
  if (options.count("threshold")) {  // an initializer that is an optional input as well
    threshold = numbers("threshold", options["threshold"]);
    if (threshold.size() != 1) throw std::runtime_error("threshold= takes one number");
    names.push_back("threshold");
    feeds.push_back(tensor(threshold, {}));
  }
  const char* outputs[] = {"label", "accept", "score"};
  const auto found = session.Run({}, names.data(), feeds.data(), feeds.size(), outputs, 3);
  const bool accepted = *found[1].GetTensorData<bool>();
  std::cout.precision(9);  // enough to read a float32 back as it was
  std::cout << (accepted ? std::to_string(*found[0].GetTensorData<int64_t>()) : "abstain") << " "
            << *found[2].GetTensorData<float>() << "\n";
}

int main(int count, char** given) {
  Options options;
  bool understood = count >= 3;
  for (int i = 3; i < count; ++i) {
    const std::string text = given[i], name = text.substr(0, text.find('='));
    understood &= (name == "mean" || name == "std" || name == "threshold") && name != text;
    options[name] = text.substr(std::min(text.size(), name.size() + 1));
  }
  if (!understood) {
    std::cerr << "usage: decide MODEL.onnx IMAGE.pnm [mean=M,...] [std=S,...] [threshold=X]\n";
    return 2;
  }
  try {
    decide(given[1], given[2], options);
  } catch (const std::exception& error) {
    const std::string cause = error.what();
    std::cerr << "decide: " << cause.substr(0, cause.find('\n')) << "\n";
    return 1;
  }
}
