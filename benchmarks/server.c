/* The least that a server can be: the engine's C API behind a Unix socket, without a protocol, checks, limits or statistics.
 *
 *   server LIBRARY MODEL SOCKET REQUEST_BYTES DIMENSION...
 *        LIBRARY is libonnxruntime. MODEL has one float input `x` of these dimensions and one output `y`, 1x10. Each connection has a
 *        thread, which runs the engine. A request is REQUEST_BYTES that end with the tensor, or, once the client has sent the descriptor of
 *        its memory, anything: the tensor is there. The answer is HTTP for the load generator's sake.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* Places in the table of functions that the library gives out. It only ever grows at its end, so they hold for every version. */
enum {
  GET_ERROR_MESSAGE = 2,
  CREATE_ENV = 3,
  CREATE_SESSION = 7,
  RUN = 9,
  CREATE_SESSION_OPTIONS = 10,
  SET_INTRA_OP_NUM_THREADS = 24,
  SET_INTER_OP_NUM_THREADS = 25,
  CREATE_TENSOR_WITH_DATA = 49,
  CREATE_CPU_MEMORY_INFO = 69,
};
#define API_VERSION 1
#define WARNING 2
#define FLOAT 1
#define ARENA 1
#define DEFAULT_MEMORY 0
#define OUTPUTS 10
#define MAX_DIMENSIONS 8

struct base {
  void *const *(*api)(uint32_t version);
  const char *(*version)(void);
};

static void *const *api;
static void *session, *memory_info;
static int64_t shape[MAX_DIMENSIONS];
static size_t dimensions, tensor_bytes = sizeof(float), request_bytes;

#define CALL(place, ...) check(((void *(*)())api[place])(__VA_ARGS__))

static void check(void *status) {
  if (status == NULL) return;
  fprintf(stderr, "server: %s\n", ((const char *(*)(void *))api[GET_ERROR_MESSAGE])(status));
  exit(1);
}

static void *tensor(void *data, size_t bytes, const int64_t *sizes, size_t count) {
  void *value = NULL;
  CALL(CREATE_TENSOR_WITH_DATA, memory_info, data, bytes, sizes, count, FLOAT, &value);
  return value;
}

/* The bytes of one request; their number, 0 at the end. `*shared` is mapped when a descriptor comes with them. */
static size_t receive(int fd, char *room, void **shared) {
  size_t have = 0;
  while (have == 0 || (*shared == NULL && have < request_bytes)) {
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec bytes = {.iov_base = room + have, .iov_len = request_bytes - have};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(fd, &message, 0);
    if (got <= 0) return 0;
    have += (size_t)got;
    struct cmsghdr *descriptor = CMSG_FIRSTHDR(&message);
    if (descriptor == NULL) continue;
    int memory;
    memcpy(&memory, CMSG_DATA(descriptor), sizeof memory);
    *shared = mmap(NULL, tensor_bytes, PROT_READ, MAP_SHARED, memory, 0);
    close(memory);
    if (*shared == MAP_FAILED) exit(1);
  }
  return have;
}

static void *serve(void *argument) {
  int fd = (int)(long)argument;
  float y[OUTPUTS];
  const int64_t y_shape[] = {1, OUTPUTS};
  const char *input_names[] = {"x"}, *output_names[] = {"y"};
  char answer[256];
  char *room = aligned_alloc(64, (request_bytes + 127) / 64 * 64);
  char *body = room + (64 - request_bytes + tensor_bytes) % 64; /* so that the tensor is aligned */
  void *shared = NULL, *known = NULL;
  void *input = request_bytes < tensor_bytes ? NULL : tensor(body + request_bytes - tensor_bytes, tensor_bytes, shape, dimensions);
  void *output = tensor(y, sizeof y, y_shape, 2);
  while (receive(fd, body, &shared)) {
    if (shared != known) {
      known = shared;
      input = tensor(shared, tensor_bytes, shape, dimensions);
    } else {
      CALL(RUN, session, NULL, input_names, &input, (size_t)1, output_names, (size_t)1, &output);
    }
    int head = snprintf(answer, sizeof answer, "HTTP/1.1 200 OK\r\ncontent-length: %zu\r\n\r\n", sizeof y);
    memcpy(answer + head, y, sizeof y);
    if (send(fd, answer, (size_t)head + sizeof y, MSG_NOSIGNAL) <= 0) break;
  }
  close(fd);
  free(room);
  return NULL;
}

int main(int count, char **words) {
  if (count < 6 || count > 5 + MAX_DIMENSIONS) {
    fprintf(stderr, "server LIBRARY MODEL SOCKET REQUEST_BYTES DIMENSION...\n");
    return 2;
  }
  void *library = dlopen(words[1], RTLD_NOW);
  struct base *(*get)(void) = library ? (struct base * (*)(void)) dlsym(library, "OrtGetApiBase") : NULL;
  if (get == NULL) {
    fprintf(stderr, "server: %s\n", dlerror());
    return 1;
  }
  api = get()->api(API_VERSION);
  request_bytes = strtoul(words[4], NULL, 10);
  for (int i = 5; i < count; i++) tensor_bytes *= (size_t)(shape[dimensions++] = atol(words[i]));
  void *environment, *options;
  CALL(CREATE_ENV, WARNING, "server", &environment);
  CALL(CREATE_SESSION_OPTIONS, &options);
  CALL(SET_INTRA_OP_NUM_THREADS, options, 1);
  CALL(SET_INTER_OP_NUM_THREADS, options, 1);
  CALL(CREATE_SESSION, environment, words[2], options, &session);
  CALL(CREATE_CPU_MEMORY_INFO, ARENA, DEFAULT_MEMORY, &memory_info);
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  snprintf(address.sun_path, sizeof address.sun_path, "%s", words[3]);
  int listener = socket(AF_UNIX, SOCK_STREAM, 0);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64)) {
    perror(words[3]);
    return 1;
  }
  for (;;) {
    pthread_t thread;
    long fd = accept(listener, NULL, NULL);
    if (fd < 0) continue;
    pthread_create(&thread, NULL, serve, (void *)fd);
    pthread_detach(thread);
  }
}
