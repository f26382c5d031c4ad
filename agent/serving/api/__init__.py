"""What can be asked, API by API.

oip, oip_request, oip_response    the Open Inference Protocol: predictions
protocol                          and everything else in it
extensions, settings, classification, memoryroutes    Triton's extensions, and memory of a connection
tfserving, tfserving_forms, tfserving_body    TensorFlow Serving's REST API
pictures, pixels                  a JPEG or PNG in, labels out
control, changes                  changing what is served
metrics                           all counts as Prometheus text
descriptions, parameters, tensors, checks, json_body    what several of them need
lists, list_pieces, excerpt, pauses    large JSON, read in pieces that keep nobody else waiting
"""
