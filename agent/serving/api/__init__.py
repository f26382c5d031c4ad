"""What can be asked, API by API.

oip, protocol            the Open Inference Protocol: predictions, and everything else
extensions, classification, memoryroutes    Triton's extensions, and memory of a connection
tfserving                TensorFlow Serving's REST API
pictures, pixels         a JPEG or PNG in, labels out
control                  changing what is served
documents, parameters, tensors, strict, checks    what several of them need
"""
