"""What an operator sees and does on the device itself, whether `sync` runs or not.

overview         `edge-agent updates`
why, why_text    `edge-agent why`: every gate, with its numbers
actions          holding, rolling back, approving, trying a refused release again
doctor           what an update needs and is not there
sources          its part about those who may have files
findings         what one of its checks found
tuf              this device's verification against any TUF repository
"""
