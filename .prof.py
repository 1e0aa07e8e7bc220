exec(open('.bench.py').read())
for H,KV,rk,rv,b in ((32,32,1024,3072,1e4),(32,8,256,768,5e5)):
    for bits in (16,):
        q,sets,key,val,rot=make(H,KV,65536,rk,rv,4,bits,b)
        L.decode_attention(q,*sets[0],key,val,rot,None,128**-.5); torch.cuda.synchronize()
