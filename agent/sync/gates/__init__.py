"""May this release go on? Numbers and times go in, a verdict comes out. All of it is pure: no disk, no network, no clock.

variants    which file of a release fits this device
windows     when a device may switch
shadow      judged on copies of live requests
canary      judged by a share of live requests
watch       judged after its activation
"""
