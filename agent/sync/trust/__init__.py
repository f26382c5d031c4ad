"""From bytes to what may be believed.

metadata    signed metadata over HTTPS, verified
versions    the highest versions ever verified
client      the fleet's documents, verified: what else trusts bytes asks here
carried     what a poke brought, as one more way to documents
pokes       when a poke is heard, and when one makes this device look
follower    asks the fleet at intervals, hears what pokes carry
desired     what this device should run. Pure
withdrawals what nobody may run any more, remembered
leases      how old the fleet's last signed word is
"""
