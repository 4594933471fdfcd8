// An 8-bit image file, and the normalisation of a bundle's manifest.
#pragma once

#include <cstdint>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Image {
  int64_t width = 0, height = 0, channels = 0;
  std::vector<uint8_t> pixels;  // [height, width, channels]
};

// A binary PGM or PPM.
inline Image read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path + "; give a PGM or PPM file");
  std::string magic;
  int64_t peak = 0;
  Image image;
  file >> magic >> image.width >> image.height >> peak;
  const int64_t longest = 16384;
  if (!file || (magic != "P5" && magic != "P6") || peak != 255 || image.width < 1 ||
      image.height < 1 || image.width > longest || image.height > longest)
    throw std::runtime_error(path + " is not a binary 8-bit PGM or PPM; convert it to one");
  image.channels = magic == "P6" ? 3 : 1;
  image.pixels.resize(image.width * image.height * image.channels);
  file.get();  // the one white space before the pixels
  if (!file.read(reinterpret_cast<char*>(image.pixels.data()), image.pixels.size()))
    throw std::runtime_error(path + " ends before its last pixel; write it again");
  return image;
}

// "0.5,0.25" as numbers; name is for the message.
inline std::vector<float> numbers(const std::string& name, const std::string& text) {
  std::vector<float> values;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    std::istringstream one(part);
    float value = 0;
    if (!(one >> value) || !(one >> std::ws).eof())
      throw std::runtime_error(name + "=" + text + " is not a list of numbers; write 0.5,0.25");
    values.push_back(value);
  }
  return values;
}

// (x / 255 - mean) / std, from [height, width, channels] to [channels, height, width].
inline std::vector<float> normalise(const Image& image, const std::vector<float>& mean,
                                    const std::vector<float>& std) {
  const size_t channels = image.channels, area = image.width * image.height;
  if (mean.size() != channels || std.size() != channels)
    throw std::runtime_error("the graph takes normalised images of " + std::to_string(channels) +
                             " channels; give mean= and std= from the manifest's preprocess");
  std::vector<float> values(channels * area);
  for (size_t i = 0; i < area; ++i)
    for (size_t c = 0; c < channels; ++c)
      values[c * area + i] = (image.pixels[i * channels + c] / 255.0f - mean[c]) / std[c];
  return values;
}
