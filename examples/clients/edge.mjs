// One request for a prediction over a Unix socket: JSON first, then the bytes of the tensors.
import http from "node:http";

const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });

/** Float32Array per output name. `inputs` is a list of {name, datatype, shape, data}, data being a typed array. */
export function infer(socketPath, model, inputs) {
  const bytes = inputs.map(({ data }) => Buffer.from(data.buffer, data.byteOffset, data.byteLength));
  const head = Buffer.from(JSON.stringify({
    inputs: inputs.map(({ name, datatype, shape }, i) => ({ name, datatype, shape, parameters: { binary_data_size: bytes[i].length } })),
    parameters: { binary_data_output: true },
  }));
  const body = Buffer.concat([head, ...bytes]);
  const headers = { "inference-header-content-length": head.length, "content-length": body.length };
  return new Promise((resolve, reject) => {
    const request = http.request({ socketPath, path: `/v2/models/${model}/infer`, method: "POST", headers, agent }, (response) => {
      const parts = [];
      response.on("data", (part) => parts.push(part));
      response.on("error", reject);
      response.on("end", () => {
        const answer = Buffer.concat(parts);
        if (response.statusCode !== 200) return reject(new Error(JSON.parse(answer).error));
        resolve(outputs(answer, Number(response.headers["inference-header-content-length"])));
      });
    });
    request.on("error", reject);
    request.end(body);
  });
}

function outputs(answer, headSize) {
  const found = {};
  let at = headSize;
  for (const { name, parameters } of JSON.parse(answer.subarray(0, headSize)).outputs) {
    const end = at + parameters.binary_data_size;
    found[name] = new Float32Array(answer.buffer.slice(answer.byteOffset + at, answer.byteOffset + end));
    at = end;
  }
  return found;
}

/** Lets the program end: no connection is kept. */
export function close() {
  agent.destroy();
}
