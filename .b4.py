exec(open('.bench.py').read())
print(torch.cuda.get_device_name(0),torch.__version__,triton.__version__)
M=(32,32,65536,1024,3072,4); G=(32,8,65536,256,768,4)
print("base M",base(32,32,65536),"G",base(32,8,65536),"M4k",base(32,32,4096),"G4k",base(32,8,4096),flush=True)
run(*M,16,chk=True);run(*M,4,chk=True);run(*G,16,base=5e5,chk=True);run(*G,4,base=5e5,chk=True)
run(32,32,4096,1024,3072,4,16,chk=True); run(32,8,4096,256,768,4,16,base=5e5,chk=True)
L.VALUE_REGISTERS=None
run(*M,16,label="vreg none");run(*M,4,label="vreg none")
L.VALUE_REGISTERS=128; L.STAGES=4
run(*M,16,label="vst4");run(*M,4,label="vst4")
L.STAGES=3
C=S.Config
S.CONFIGS={"numbers":C(2,2,None),"codes":C(2,3,None)}
run(*M,16,label="st2");run(*M,4,label="2 st3 None"); run(*G,16,base=5e5,label="st2"); run(*G,4,base=5e5,label="2 st3 None")
S.CONFIGS={"numbers":C(2,3,None),"codes":C(2,2,None)}
run(*M,4,label="2 st2 None")
