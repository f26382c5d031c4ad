/* The two ends of a measurement, without an interpreter in the way.
 *
 *   load echo SOCKET REQUEST_BYTES REPLY_BYTES      answers every REQUEST_BYTES with REPLY_BYTES, for ever
 *   load drive ADDRESS REQUEST_FILE KIND CLIENTS SECONDS [MEMORY_FILE]
 *        ADDRESS is the path of a Unix socket, or 127.0.0.1:PORT. CLIENTS threads, each with one connection, send the file's bytes and wait for the answer, again and again.
 *        KIND is `http` (status 200 and the whole Content-Length) or a number of bytes.
 *        The bytes of MEMORY_FILE are shared by each connection first, in a sealed memfd, as the region `bench`.
 *        Prints JSON: answers, failures, seconds, and the latencies' percentiles in microseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define WARM_UP_S 0.2
#define MAX_HEAD 4096

static struct sockaddr_un address_of(const char *path) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
  return address;
}

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int send_all(int fd, const char *data, size_t size) {
  while (size > 0) {
    ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return 0;
    data += sent;
    size -= (size_t)sent;
  }
  return 1;
}

static int receive_all(int fd, char *room, size_t size) {
  while (size > 0) {
    ssize_t got = recv(fd, room, size, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return 0;
    room += got;
    size -= (size_t)got;
  }
  return 1;
}

/* ---- echo ---- */

static size_t echo_request, echo_reply;

static void *echo_one(void *argument) {
  int fd = (int)(long)argument;
  char *room = malloc(echo_request), *reply = calloc(1, echo_reply);
  while (receive_all(fd, room, echo_request) && send_all(fd, reply, echo_reply)) {}
  close(fd);
  free(room);
  free(reply);
  return NULL;
}

static int echo(const char *path) {
  struct sockaddr_un address = address_of(path);
  int listener = socket(AF_UNIX, SOCK_STREAM, 0);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64)) {
    perror(path);
    return 1;
  }
  for (;;) {
    pthread_t thread;
    long fd = accept(listener, NULL, NULL);
    if (fd < 0) continue;
    pthread_create(&thread, NULL, echo_one, (void *)fd);
    pthread_detach(thread);
  }
}

/* ---- drive ---- */

static struct sockaddr_storage target;
static socklen_t target_size;
static char *request, *memory;
static size_t request_size, memory_size, reply_size; /* of the reply 0: HTTP */
static double start_s, end_s;

struct client {
  pthread_t thread;
  float *latencies_us;
  size_t count, room;
  long failures;
};

/* A body in chunks ends with an empty one. */
static int receive_chunks(int fd, char **room, size_t *room_size, size_t have) {
  while (have < 7 || memcmp(*room + have - 7, "\r\n0\r\n\r\n", 7) != 0) {
    if (have + 1 >= *room_size) *room = realloc(*room, *room_size *= 2);
    ssize_t got = recv(fd, *room + have, *room_size - have - 1, 0);
    if (got <= 0) return 0;
    have += (size_t)got;
  }
  return 1;
}

/* One HTTP answer into `room`, which grows. 0 when the connection broke or the status is not 200. */
static int receive_http(int fd, char **room, size_t *room_size) {
  size_t have = 0;
  char *end = NULL;
  while (end == NULL) {
    if (have >= MAX_HEAD) return 0;
    ssize_t got = recv(fd, *room + have, *room_size - have - 1, 0);
    if (got <= 0) return 0;
    have += (size_t)got;
    (*room)[have] = 0;
    end = strstr(*room, "\r\n\r\n");
  }
  size_t head = (size_t)(end - *room) + 4;
  char *field = strcasestr(*room, "\r\ntransfer-encoding: chunked");
  if (field && field < end) return strncmp(*room, "HTTP/1.1 200 ", 13) == 0 && receive_chunks(fd, room, room_size, have);
  field = strcasestr(*room, "\r\ncontent-length:");
  size_t size = head + (field && field < end ? strtoul(field + 17, NULL, 10) : 0);
  int ok = strncmp(*room, "HTTP/1.1 200 ", 13) == 0;
  if (size + 1 > *room_size) {
    *room_size = size + 1;
    *room = realloc(*room, *room_size);
  }
  return have <= size && receive_all(fd, *room + have, size - have) && ok;
}

/* 1 when the connection has the memory, or needs none. */
static int share_memory(int fd, char **room, size_t *room_size) {
  if (memory == NULL) return 1;
  char body[64], head[256];
  int body_size = snprintf(body, sizeof body, "{\"byte_size\": %zu}", memory_size);
  int head_size = snprintf(head, sizeof head, "POST /v2/edge/memory/bench/register HTTP/1.1\r\nhost: bench\r\ncontent-length: %d\r\n\r\n%s", body_size, body);
  int shared = memfd_create("bench", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (shared < 0 || ftruncate(shared, (off_t)memory_size)) return 0;
  void *place = mmap(NULL, memory_size, PROT_READ | PROT_WRITE, MAP_SHARED, shared, 0);
  if (place == MAP_FAILED) return 0;
  memcpy(place, memory, memory_size);
  munmap(place, memory_size);
  fcntl(shared, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
  char control[CMSG_SPACE(sizeof shared)] = {0};
  struct iovec bytes = {.iov_base = head, .iov_len = (size_t)head_size};
  struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
  struct cmsghdr *descriptor = CMSG_FIRSTHDR(&message);
  descriptor->cmsg_level = SOL_SOCKET;
  descriptor->cmsg_type = SCM_RIGHTS;
  descriptor->cmsg_len = CMSG_LEN(sizeof shared);
  memcpy(CMSG_DATA(descriptor), &shared, sizeof shared);
  int sent = sendmsg(fd, &message, MSG_NOSIGNAL) == head_size;
  close(shared);
  return sent && receive_http(fd, room, room_size);
}

static void keep(struct client *client, double seconds) {
  if (client->count == client->room) {
    client->room = client->room ? 2 * client->room : 1 << 16;
    client->latencies_us = realloc(client->latencies_us, client->room * sizeof(float));
  }
  client->latencies_us[client->count++] = (float)(seconds * 1e6);
}

static void *drive_one(void *argument) {
  struct client *client = argument;
  size_t room_size = reply_size ? reply_size : 1 << 16;
  char *room = malloc(room_size);
  int fd = -1;
  for (;;) {
    if (fd < 0) {
      struct timeval limit = {.tv_sec = 10};
      int at_once = 1;
      fd = socket(target.ss_family, SOCK_STREAM, 0);
      setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
      if (target.ss_family == AF_INET) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &at_once, sizeof at_once);
      if (connect(fd, (struct sockaddr *)&target, target_size) || !share_memory(fd, &room, &room_size)) {
        close(fd);
        fd = -1;
        client->failures++;
        usleep(1000);
      }
    }
    double began = now_s();
    if (began >= end_s) break;
    if (fd < 0) continue;
    int ok = send_all(fd, request, request_size) &&
             (reply_size ? receive_all(fd, room, reply_size) : receive_http(fd, &room, &room_size));
    if (!ok) {
      client->failures++;
      close(fd);
      fd = -1;
    } else if (began >= start_s) {
      keep(client, now_s() - began);
    }
  }
  if (fd >= 0) close(fd);
  free(room);
  return NULL;
}

static int ascending(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static void aim(const char *address) {
  const char *colon = strrchr(address, ':');
  if (colon == NULL || strchr(address, '/')) {
    struct sockaddr_un local = address_of(address);
    memcpy(&target, &local, target_size = sizeof local);
    return;
  }
  struct sockaddr_in loopback = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(colon + 1))};
  loopback.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  memcpy(&target, &loopback, target_size = sizeof loopback);
}

static char *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  if (file == NULL) {
    perror(path);
    exit(1);
  }
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  char *bytes = malloc(*size);
  if (fread(bytes, 1, *size, file) != *size) exit(1);
  fclose(file);
  return bytes;
}

static int drive(const char *kind, int count, double seconds) {
  reply_size = strcmp(kind, "http") == 0 ? 0 : strtoul(kind, NULL, 10);
  struct client *clients = calloc((size_t)count, sizeof *clients);
  start_s = now_s() + WARM_UP_S;
  end_s = start_s + seconds;
  for (int i = 0; i < count; i++) pthread_create(&clients[i].thread, NULL, drive_one, &clients[i]);
  size_t total = 0, at = 0;
  long failures = 0;
  for (int i = 0; i < count; i++) {
    pthread_join(clients[i].thread, NULL);
    total += clients[i].count;
    failures += clients[i].failures;
  }
  float *all = malloc((total + 1) * sizeof *all);
  for (int i = 0; i < count; i++) {
    memcpy(all + at, clients[i].latencies_us, clients[i].count * sizeof *all);
    at += clients[i].count;
  }
  qsort(all, total, sizeof *all, ascending);
  printf("{\"answers\":%zu,\"failures\":%ld,\"seconds\":%.3f,\"p50_us\":%.2f,\"p99_us\":%.2f,\"max_us\":%.2f}\n", total, failures,
         seconds, total ? all[total / 2] : 0, total ? all[(size_t)((double)total * 0.99)] : 0, total ? all[total - 1] : 0);
  return 0;
}

int main(int count, char **words) {
  if (count == 5 && strcmp(words[1], "echo") == 0) {
    echo_request = strtoul(words[3], NULL, 10);
    echo_reply = strtoul(words[4], NULL, 10);
    return echo(words[2]);
  }
  if ((count == 7 || count == 8) && strcmp(words[1], "drive") == 0) {
    aim(words[2]);
    request = read_file(words[3], &request_size);
    if (count == 8) memory = read_file(words[7], &memory_size);
    return drive(words[4], atoi(words[5]), atof(words[6]));
  }
  fprintf(stderr, "load echo SOCKET REQUEST_BYTES REPLY_BYTES | load drive SOCKET REQUEST_FILE KIND CLIENTS SECONDS [MEMORY_FILE]\n");
  return 2;
}
