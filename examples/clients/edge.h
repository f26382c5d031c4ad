/* One request for a prediction over a Unix socket, in plain C: JSON first, then the bytes of the tensors. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* A connection that stays open between requests. Ends the program when nobody listens. */
static int edge_connect(const char *path) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(path) >= sizeof address.sun_path) {
    fprintf(stderr, "%s is too long for a socket\n", path);
    exit(1);
  }
  strcpy(address.sun_path, path);
  int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) {
    perror(path);
    exit(1);
  }
  return fd;
}

static void edge_send(int fd, const void *data, size_t size) {
  for (const char *at = data; size > 0;) {
    ssize_t sent = send(fd, at, size, MSG_NOSIGNAL);
    if (sent <= 0) {
      perror("send");
      exit(1);
    }
    at += sent;
    size -= (size_t)sent;
  }
}

/* Sends `json` and `tensors` to the model; the bytes of its outputs, one after the other, go to `outputs`.
 * `json` must ask for binary outputs. Ends the program with the server's words when it refuses. */
static void edge_infer(int fd, const char *model, const char *json, const void *tensors, size_t tensors_size, void *outputs, size_t outputs_size) {
  char head[512], answer[16384];
  int size = snprintf(head, sizeof head,
                      "POST /v2/models/%s/infer HTTP/1.1\r\nhost: localhost\r\ninference-header-content-length: %zu\r\n"
                      "content-length: %zu\r\n\r\n", model, strlen(json), strlen(json) + tensors_size);
  edge_send(fd, head, (size_t)size);
  edge_send(fd, json, strlen(json));
  edge_send(fd, tensors, tensors_size);

  size_t have = 0, whole = sizeof answer - 1;
  char *body = NULL;
  while (have < whole) {
    ssize_t got = recv(fd, answer + have, sizeof answer - 1 - have, 0);
    if (got <= 0) {
      fprintf(stderr, "the server closed the connection\n");
      exit(1);
    }
    have += (size_t)got;
    answer[have] = 0;
    if (body == NULL && (body = strstr(answer, "\r\n\r\n")) != NULL) {
      body += 4;
      char *length = strcasestr(answer, "\r\ncontent-length:");
      whole = (size_t)(body - answer) + (length != NULL && length < body ? strtoul(length + 17, NULL, 10) : 0);
    }
  }
  char *json_size = strcasestr(answer, "\r\ninference-header-content-length:");
  if (strncmp(answer, "HTTP/1.1 200 ", 13) != 0 || json_size == NULL || json_size > body) {
    fprintf(stderr, "%s\n", body);
    exit(1);
  }
  const char *values = body + strtoul(json_size + 34, NULL, 10);
  if (values + outputs_size != answer + whole) {
    fprintf(stderr, "the model's outputs have %td bytes, expected %zu\n", answer + whole - values, outputs_size);
    exit(1);
  }
  memcpy(outputs, values, outputs_size);
}
