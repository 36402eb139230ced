// Stands in for Nsight Systems: NVTX loads this library (NVTX_INJECTION64_PATH) and calls it for
// every range. Each push and pop becomes a line of the file that HELIOS_NVTX_LOG names: "push
// DOMAIN THREAD MESSAGE" and "pop DOMAIN THREAD". Layouts and numbers are those of NVTX's public
// headers, version 3 (nvtxDetail/nvtxTypes.h, nvToolsExt.h).

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace {

struct ExportTableCallbacks {
  std::size_t struct_size;
  int (*get_module_function_table)(int module, void**** table, unsigned* size);
};
constexpr std::uint32_t kCallbacks = 1;  // NVTX_ETID_CALLBACKS
constexpr int kCore2 = 5;                // NVTX_CB_MODULE_CORE2
enum { kPush = 4, kPop = 5, kRegisterString = 10, kCreateDomain = 12, kSize = 16 };

struct EventAttributes {  // nvtxEventAttributes_v2
  std::uint16_t version, size;
  std::uint32_t category;
  std::int32_t color_type;
  std::uint32_t color;
  std::int32_t payload_type, reserved;
  std::uint64_t payload;
  std::int32_t message_type;  // 1 text, 3 a registered string
  const void* message;
};

// Domains and registered strings are handles of the injection's own making: here the text itself.
void* keep(const char* text) { return new std::string(text); }

void say(const char* what, const void* domain, const std::string& message) {
  static std::mutex lock;
  static std::FILE* file = std::fopen(std::getenv("HELIOS_NVTX_LOG"), "w");
  const std::lock_guard<std::mutex> guard(lock);
  const std::size_t thread = std::hash<std::thread::id>()(std::this_thread::get_id());
  const char* name =
      domain == nullptr ? "default" : static_cast<const std::string*>(domain)->c_str();
  std::fprintf(file, "%s %s %zu %s\n", what, name, thread, message.c_str());
  std::fflush(file);
}

int push(const void* domain, const EventAttributes* event) {
  say("push", domain,
      event->message_type == 3   ? *static_cast<const std::string*>(event->message)
      : event->message_type == 1 ? static_cast<const char*>(event->message)
                                 : "(no text)");
  return 0;
}

int pop(const void* domain) {
  say("pop", domain, "");
  return 0;
}

void* register_string(const void*, const char* text) { return keep(text); }
void* create_domain(const char* name) { return keep(name); }

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(
    const void* (*get_export_table)(std::uint32_t)) {
  const auto* callbacks = static_cast<const ExportTableCallbacks*>(get_export_table(kCallbacks));
  void*** table = nullptr;
  unsigned size = 0;
  if (callbacks == nullptr || callbacks->get_module_function_table(kCore2, &table, &size) == 0)
    return 0;
  if (size < kSize) return 0;
  *table[kPush] = reinterpret_cast<void*>(push);
  *table[kPop] = reinterpret_cast<void*>(pop);
  *table[kRegisterString] = reinterpret_cast<void*>(register_string);
  *table[kCreateDomain] = reinterpret_cast<void*>(create_domain);
  return 1;
}
